"""Sizes of models that are made small to be compared with one device."""

HEAD_SIZE, WIDTH, HIDDEN, VOCABULARY, LENGTH, WINDOW = 8, 80, 96, 96, 16, 5
