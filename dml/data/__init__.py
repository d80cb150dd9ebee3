"""Images with labels: datasets and their splits, decoding and transforms, P x K batches."""
