"""What a training needs before it is started: memory a GPU, time a step, and the sample rate that fits."""
