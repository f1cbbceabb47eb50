"""The system of the Gemini 1.5 report as composable commands: long contexts as files."""

__version__ = "0.1.0"
