"""Text, images, audio and video to spans; packing; shards; the vocabulary."""
