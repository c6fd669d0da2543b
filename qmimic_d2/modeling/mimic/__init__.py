"""The mimic: adapters, regions, pairs of features, the loss, its weight, and the frozen teacher."""
