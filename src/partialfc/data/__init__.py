"""Training and verification data: from files to uint8 batches.

`images` decodes and encodes; `sources` are training sets in any format; `loader` makes batches of a source, which
`augment` turns into network input on the device; `inspect` checks and hashes a source; `pair_files` are verification
pairs; `align` warps faces onto the template.
"""
