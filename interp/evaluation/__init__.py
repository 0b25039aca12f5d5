"""How good, and how honest, are captions and answers about images: CHAIR, POPE, MME-style pairs.

The metrics take any texts and annotations; `caption_images` and `answer_questions` get the texts from a model.
"""

from interp.evaluation.answering import Answers, answer_questions, answer_tokens, caption_images, image_prompt
from interp.evaluation.chair import ChairScores, chair
from interp.evaluation.coco import coco_classes, coco_files, coco_objects
from interp.evaluation.marking import Piece, marked, pieces
from interp.evaluation.measured import Measured, Number
from interp.evaluation.mme import MmeScores, mme
from interp.evaluation.parsers import parse_answer, parse_answer_compat, parse_answer_mme
from interp.evaluation.pope import PopeScores, pope
from interp.evaluation.questions import Question, pope_questions
from interp.evaluation.records import (
    read_answers,
    read_captions,
    read_questions,
    write_answers,
    write_captions,
    write_questions,
)
from interp.evaluation.vocabulary import Mention, Vocabulary

__all__ = [
    "Answers",
    "ChairScores",
    "Measured",
    "Mention",
    "MmeScores",
    "Number",
    "Piece",
    "PopeScores",
    "Question",
    "Vocabulary",
    "answer_questions",
    "answer_tokens",
    "caption_images",
    "chair",
    "coco_classes",
    "coco_files",
    "coco_objects",
    "image_prompt",
    "marked",
    "mme",
    "parse_answer",
    "parse_answer_compat",
    "parse_answer_mme",
    "pieces",
    "pope",
    "pope_questions",
    "read_answers",
    "read_captions",
    "read_questions",
    "write_answers",
    "write_captions",
    "write_questions",
]
