"""What to believe: captions and answers about images (CHAIR, POPE, MME-style pairs), and scores of tokens and patches.

The metrics take any texts and annotations; `caption_images` and `answer_questions` get the texts from a model. Scores
of tokens are checked by taking tokens away, against other scores, and against the masks of objects.
"""

from interp.evaluation.agreement import Agreement, agreement
from interp.evaluation.answering import Answers, answer_questions, answer_tokens, caption_images, image_prompt
from interp.evaluation.chair import ChairScores, chair
from interp.evaluation.coco import coco_classes, coco_files, coco_objects
from interp.evaluation.curve import Curve
from interp.evaluation.curves import deletion_curve, insertion_curve
from interp.evaluation.joined import joined
from interp.evaluation.localisation import Localisation, iou, otsu, pointing
from interp.evaluation.marking import Piece, marked, pieces
from interp.evaluation.measured import Measured, Number
from interp.evaluation.mme import MmeScores, mme
from interp.evaluation.paired import paired
from interp.evaluation.parsers import parse_answer, parse_answer_compat, parse_answer_mme
from interp.evaluation.pope import PopeScores, pope
from interp.evaluation.questions import Question, pope_questions
from interp.evaluation.ranks import rank_correlation
from interp.evaluation.records import (
    read_answers,
    read_captions,
    read_questions,
    write_answers,
    write_captions,
    write_questions,
)
from interp.evaluation.recovery import Recovery, recovery_rates
from interp.evaluation.surprise import caption_surprise
from interp.evaluation.vocabulary import Mention, Vocabulary

__all__ = [
    "Agreement",
    "Answers",
    "ChairScores",
    "Curve",
    "Localisation",
    "Measured",
    "Mention",
    "MmeScores",
    "Number",
    "Piece",
    "PopeScores",
    "Question",
    "Recovery",
    "Vocabulary",
    "agreement",
    "answer_questions",
    "answer_tokens",
    "caption_images",
    "caption_surprise",
    "chair",
    "coco_classes",
    "coco_files",
    "coco_objects",
    "deletion_curve",
    "image_prompt",
    "insertion_curve",
    "iou",
    "joined",
    "marked",
    "mme",
    "otsu",
    "paired",
    "parse_answer",
    "parse_answer_compat",
    "parse_answer_mme",
    "pieces",
    "pointing",
    "pope",
    "pope_questions",
    "rank_correlation",
    "read_answers",
    "read_captions",
    "read_questions",
    "recovery_rates",
    "write_answers",
    "write_captions",
    "write_questions",
]
