"""What several codecs are put together from: quantisers, transforms, common random draws."""
