"""Measures of embeddings: threshold consistency, operating points, retrieval."""
