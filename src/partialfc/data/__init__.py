"""Training and verification data: from files to uint8 batches.

`images` decodes and encodes; `sources` are training sets in any format; `loader` makes batches of a source, which
`augment` turns into network input on the device; `duplicates` finds copies of images; `inspect` checks and hashes a
source, and `inspect_page` shows it; `corrupt` damages one for studies; `pair_files` are verification pairs; `align`
warps faces onto the template.
"""
