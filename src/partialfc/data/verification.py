"""An older name of `pair_files`, for programs that import `read_pairs` from here."""

from partialfc.data.pair_files import read_pairs as read_pairs
