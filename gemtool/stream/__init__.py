"""What flows on a pipe: span streams, context streams, JSONL."""
