"""ctclip: 3-D vision-language learning on chest CT."""

__version__ = "0.1.0"
