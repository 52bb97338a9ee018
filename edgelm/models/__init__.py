"""The mathematics of each model family, written once over named operations: see `edgelm.reference` for their meaning."""
