"""What is read off finished trials: their rows, the front, the verdict on it and what it rests on."""
