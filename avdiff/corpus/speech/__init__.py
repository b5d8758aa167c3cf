"""Speech of the corpus: banks of utterances with phone times, built, read, cut and joined."""
