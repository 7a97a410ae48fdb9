"""The smaller model: which units stay, the slices, the class and config, the proof."""
