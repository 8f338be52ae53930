"""`mmoe bench`: the MoE layer against a dense layer and its peers, and models of the zoo, timed on this machine."""
