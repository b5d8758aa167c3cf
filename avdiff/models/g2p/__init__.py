"""Networks of the grapheme-to-phoneme conversion: pronouncer and duration predictor."""
