"""The steps of scripts/qwen_trio.py: download and convert, draw problems, train the expert."""
