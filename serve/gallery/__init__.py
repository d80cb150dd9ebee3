"""Galleries: named collections of embeddings on disk that queries are searched in."""
