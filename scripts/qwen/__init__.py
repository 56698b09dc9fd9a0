"""The steps of scripts/qwen_trio.py: download, convert, train the expert, evaluate."""
