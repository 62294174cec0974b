"""What an encoder or decoder is worth: classification, retrieval, generation and bias.

Nothing of the training stack is imported: any folder or hub id that transformers reads is evaluated alike.
"""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait, which costs a multiple of the time where another process has one of the cores
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of 300,000; read when torch is imported
