"""What an encoder or decoder is worth: classification, retrieval, generation and bias.

Nothing of the training stack is imported: any folder or hub id that transformers reads is evaluated alike.
"""

__version__ = "0.1.0"
