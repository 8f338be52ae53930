"""Importing it takes all that is in memory by then out of the garbage collector's rounds.

A round over the libraries takes half a second, the engine asks for one at the end of every stage, and in a forked
process it would copy their pages.
"""

import gc

gc.collect()
gc.freeze()
