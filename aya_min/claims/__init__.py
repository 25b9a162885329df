"""One paper, one file: a controlled small experiment that says whether the paper's claim shows. A claim file
imports mechanisms, never another claim file; aya_min/experiments.py says what it holds and runs it."""
