"""Procedural faces: a small renderer of its own, and the writers of data sets made of its images.

A module imports only from those before it:

    settings     how strong each nuisance is
    traits       what an identity is: traits, expressions, and the linear map from them to the shape of a face
    parameters   the random draws of a batch: traits, expressions, nuisances
    geometry     the surface of the head: radius map, ray intersection, normals, shadow
    camera       pose, perspective, framing, lens and sensor
    lighting     lamp, sky, sheen
    paint        albedo of skin, eyes, brows, nose, mouth, beard; on it stand hair and accessories (glasses, mask)
    background   the scene behind the head
    render       `render_faces`: all of the above, in batches
    encode       images as JPEG files, rendered by several processes
    sets         training sets, verification pairs and contact sheets as files
    protocols    twins of the published benchmarks, in the files of those
"""
