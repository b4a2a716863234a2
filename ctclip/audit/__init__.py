"""Looking inside data and models: doubles, geometry of embeddings, concepts, pairs that do not belong together."""
