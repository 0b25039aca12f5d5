"""Text corpora, and pictures with text, as ordered sources of documents that can be resumed at any place.

interp.data.corpus("books/", seed=0)                        # a folder of text files
interp.data.corpus("pile.parquet", column="text")           # a column of a table
interp.data.corpus("hf:roneneldan/TinyStories")             # streamed from the Hugging Face hub
interp.data.corpus("scenes")                                # the bundled pictures with captions
"""

from interp.data.corpora.choose import corpus
from interp.data.corpora.corpus import Corpus, Document, TextCorpus
from interp.data.corpora.files import FileCorpus
from interp.data.corpora.hub import HubCorpus
from interp.data.corpora.pictures import PictureCorpus, SceneCorpus

__all__ = ["Corpus", "Document", "FileCorpus", "HubCorpus", "PictureCorpus", "SceneCorpus", "TextCorpus", "corpus"]
