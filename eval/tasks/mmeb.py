"""MMEB (arXiv 2410.05160) and MMEB-V2 (arXiv 2507.04590) as declared data: 36 sets of images, 18 of video, 24 of pages.

Every query of an image or video set ranks its own candidates, or those of the whole set, and Hit@1 counts; pages are
retrieved from the set's corpus, nDCG@5 with the grade itself as gain. An average is one of sets, not of queries.

Where the facts are from, all read in November 2026:

- names, layouts, columns, instructions of video and pages, frames and protocol: the public evaluation code and
  configurations of TIGER-AI-Lab/VLM2Vec. Video is 8 frames there; models that are evaluated with more say so. Rows of
  images are those that v2's code reads, with instructions in columns of their own, for v1 too.
- categories: the readers of that code; a side whose data hold texts gets them whatever is declared here.
- the 24 sets of pages, not 27: the leaderboard leaves out the three English halves of ViDoRe v2 and takes the
  corrected releases of two out-of-domain sets (`docs/mmebv2_reproduction` there). MomentSeeker has 1,602 queries.
- in-domain are the 20 sets with a training part in the configuration of VLM2Vec; v2 divides no others so (`None`).
- `queries`: of video and pages the counts in the leaderboard's and the repository's score files; 1,000 an image set.
- `candidates`, copies included: of images and video those of Table 1 of the two papers, but of three image sets what
  an audit by others counted in the data, which have fewer; of pages the corpora as mteb counted them and, of ViDoSeek,
  as its card says. Where tables and data disagree, `tests/golden/mmeb.json` has both. `None`: it differs between
  queries, or no count was found. A run says where data differ from a count.
- instructions of images are columns of the data (`qry_inst`, `tgt_inst`) and are not repeated here.
- revisions: of MMEB-V2 and MSVD those that public download scripts pin; of ViDoRe, VisRAG and MMLongBench-doc those
  that mteb pins, or pinned before it made copies of the data; of YouCook2 the last commit on its page. For the others
  none was found: the official code pins none, and the hub could not be read. `None` takes the newest, which a run says.

No file of the sets themselves could be read here: what they hold is known from the code that reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Modality = Literal["image", "video", "document"]
Layout = Literal["pairs", "pages", "labels", "choices", "captions", "clips", "moments"]

MEDIA, MEDIA_REVISION = "TIGER-Lab/MMEB-V2", "e7bbfeb69a70dfe32ff36da3d6d8dbe31fc36af1"
FRAMES = 8
EVERY = "*"  # of the configurations in `MVBENCH`
OWN_CANDIDATES = ("pairs", "choices", "clips", "moments")
OVERALL = {"image": "images", "video": "videos", "document": "pages"}


@dataclass(frozen=True)
class Choices:
    """How a question about a video offers its answers.

    Attributes:
        columns: one column with a list, or a column a choice. Empty: yes and no.
        shown: how the query shows them: on `lines`, as `words`, `lettered` by the reader, not at all (``).
        answer: what the answer column holds: the `text`, a `letter`, or an `index`.
        lettered: the candidates' own letter (`A. `) is taken off, or one is put before (`(A) `), or neither.
    """

    columns: tuple[str, ...]
    shown: Literal["lines", "words", "lettered", "yes or no", ""]
    answer: Literal["text", "letter", "index"]
    lettered: Literal["taken off", "put before", "neither"] = "neither"


@dataclass(frozen=True)
class Set:
    """One set.

    Attributes:
        task: the meta-task.
        category: modalities of query and document (i a picture, v a video, t a text).
        layout: how its rows are read. columns: what the reader calls a column -> its name in the data.
        repository, revision, config, split: of its rows. media: folder of a video's frames in the repository `MEDIA`,
            `{}` for the video, `{subset}` for the configuration of its row.
        instruction: told with queries, `document_instruction` with documents; None: columns of the data say it.
        in_domain: whether MMEB has a training part of it.
        candidates: a query. queries: of the set. first: takes so many rows, from the beginning.
        languages: of the queries.
    """

    name: str
    task: str
    modality: Modality
    category: str
    layout: Layout
    repository: str
    revision: str | None = None
    config: str | None = None
    split: str = "test"
    columns: Mapping[str, str] = field(default_factory=dict)
    media: str = ""
    choices: Choices | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    in_domain: bool | None = None
    candidates: int | None = None
    queries: int | None = None
    first: int | None = None
    languages: tuple[str, ...] = ("en",)

    @property
    def kind(self) -> Literal["retrieval", "reranking"]:
        return "reranking" if self.layout in OWN_CANDIDATES else "retrieval"

    @property
    def main_score(self) -> str:
        return "ndcg_at_5" if self.modality == "document" else "hit_rate_at_1"

    @property
    def folder(self) -> str:
        return self.repository

    @property
    def modalities(self) -> tuple[str, ...]:
        names = {"t": "text", "i": "image", "v": "frames"}
        return tuple(name for code, name in names.items() if code in self.category)

    @property
    def has_images(self) -> bool:
        return True

    @property
    def group(self) -> str:
        return f"{self.modality} {self.task}"

    @property
    def overall(self) -> tuple[str, ...]:
        domain = {True: ("images in-domain",), False: ("images out-of-domain",), None: ()}[self.in_domain]
        return (*domain, OVERALL[self.modality], "all")


# Images ---------------------------------------------------------------------------------------------------------------

IMAGES = "ziyjiang/MMEB_Test_Instruct"
PAIRS = {"instruction": "qry_inst", "text": "qry_text", "image": "qry_img_path", "document_instruction": "tgt_inst",
         "document_text": "tgt_text", "document_image": "tgt_img_path"}  # fmt: skip


def _images(task: str, in_domain: bool, sets: Mapping[str, str], counts: Mapping[str, int]) -> tuple[Set, ...]:
    """Sets by name, each with its category. counts: candidates of a query, the first of which is the right one."""
    return tuple(
        Set(name, task, "image", category, "pairs", IMAGES, config=name, columns=PAIRS, in_domain=in_domain,
            candidates=counts.get(name, 1000), queries=1000)
        for name, category in sets.items()
    )  # fmt: skip


_LABELS = {"N24News": 24, "HatefulMemes": 2, "VOC2007": 20, "SUN397": 397, "Place365": 365, "ImageNet-R": 200,
           "ObjectNet": 113, "Country211": 211}  # fmt: skip
_ANSWERS = {"A-OKVQA": 894, "ScienceQA": 736}

_IMAGE_SETS = (
    *_images("classification", True, {"ImageNet-1K": "i2t", "N24News": "it2t", "HatefulMemes": "i2t",
             "VOC2007": "i2t", "SUN397": "i2t"}, _LABELS),
    *_images("classification", False, {"Place365": "i2t", "ImageNet-A": "i2t", "ImageNet-R": "i2t",
             "ObjectNet": "i2t", "Country211": "i2t"}, _LABELS),
    *_images("question answering", True, {"OK-VQA": "it2t", "A-OKVQA": "it2t", "DocVQA": "it2t",
             "InfographicsVQA": "it2t", "ChartQA": "it2t", "Visual7W": "it2t"}, _ANSWERS),
    *_images("question answering", False, {"ScienceQA": "it2t", "VizWiz": "it2t", "GQA": "it2t",
             "TextVQA": "it2t"}, _ANSWERS),
    *_images("retrieval", True, {"VisDial": "t2i", "CIRR": "it2i", "VisualNews_t2i": "t2i", "VisualNews_i2t": "i2t",
             "MSCOCO_t2i": "t2i", "MSCOCO_i2t": "i2t", "NIGHTS": "i2i", "WebQA": "t2it"}, {}),
    *_images("retrieval", False, {"FashionIQ": "it2i", "Wiki-SS-NQ": "t2i", "OVEN": "it2it", "EDIS": "t2it"}, {}),
    *_images("grounding", True, {"MSCOCO": "it2i"}, {}),
    *_images("grounding", False, {"RefCOCO": "it2i", "RefCOCO-Matching": "it2it", "Visual7W-Pointing": "it2i"}, {}),
)  # fmt: skip

# Video ----------------------------------------------------------------------------------------------------------------

_ASKED = ("Given a video and a question, select the most accurate answer from the provided candidates. Return only the "
          "exact text of your chosen answer. Question:")  # fmt: skip
_VIDEO = "Understand the content of the provided video."
_MOMENT = "Find the clip that corresponds to the described scene in the given video:"


def _labels(name: str, repository: str, instruction: str, labels: int, queries: int) -> Set:
    return Set(
        name, "classification", "video", "v2t", "labels", f"VLM2Vec/{repository}", instruction=instruction,
        columns={"video": "video_id", "label": "pos_text"}, media=f"video_cls/{name}/{{}}", candidates=labels,
        queries=queries,
    )  # fmt: skip


def _questions(
    name: str, columns: Mapping[str, str], choices: Choices, candidates: int | None, queries: int,
    config: str | None = None, split: str = "test", media: str = "{}",
) -> Set:  # fmt: skip
    return Set(
        name, "question answering", "video", "vt2t", "choices", f"VLM2Vec/{name}", config=config, split=split,
        columns=columns, choices=choices, instruction=_ASKED, media=f"video_qa/{name}/{media}", candidates=candidates,
        queries=queries,
    )  # fmt: skip


def _captions(
    name: str, instruction: str, video: str, caption: str, rows: int, repository: str | None = None,
    revision: str | None = None, config: str | None = None, split: str = "test",
) -> Set:  # fmt: skip
    return Set(
        name, "retrieval", "video", "t2v", "captions", repository or f"VLM2Vec/{name}", revision, config, split,
        columns={"video": video, "caption": caption}, instruction=instruction, document_instruction=_VIDEO,
        media=f"video_ret/{name}/{{}}", candidates=rows, queries=rows,
    )  # fmt: skip


_VIDEO_SETS = (
    _labels("K700", "Kinetics-700", "Recognize the category of the video content.", 700, 1000),
    Set("SmthSmthV2", "classification", "video", "v2t", "choices", "VLM2Vec/SmthSmthV2",
        columns={"video": "video_id", "answer": "pos_text"}, choices=Choices(("neg_text",), "", "text"),
        instruction="What actions or object interactions are being performed by the person in the video?",
        media="video_cls/SSv2/{}", candidates=174, queries=1000, first=1000),
    _labels("HMDB51", "HMDB51", "What actions or objects interactions are the person in the video doing?", 51, 1000),
    _labels("UCF101", "UCF101", "What activities or sports are being performed by the person in the video?", 101, 1000),
    _labels("Breakfast", "Breakfast", "Recognize the breakfast type that the person is cooking in the video.", 10, 433),
    _questions("MVBench", {"video": "video", "question": "question", "answer": "answer"},
               Choices(("candidates",), "lettered", "text", "put before"), None, 4000, config=EVERY, split="train",
               media="{subset}/{}"),
    _questions("Video-MME", {"video": "videoID", "question": "question", "answer": "answer"},
               Choices(("options",), "lines", "letter", "taken off"), 4, 2700),
    _questions("NExTQA", {"video": "video", "question": "question", "answer": "answer"},
               Choices(("a0", "a1", "a2", "a3", "a4"), "lettered", "index"), 5, 8564, config="MC"),
    _questions("EgoSchema", {"video": "video_idx", "question": "question", "answer": "answer"},
               Choices(("option",), "words", "index", "taken off"), 5, 500, config="Subset"),
    _questions("ActivityNetQA", {"video": "video_name", "question": "question", "answer": "answer"},
               Choices((), "yes or no", "text"), 2, 1000, media="v_{}"),
    _captions("DiDeMo", "Find a video that includes the following described scenes:", "video", "caption", 1004),
    _captions("MSR-VTT", "Find a video that contains the following visual content:", "video_id", "caption", 1000,
              config="test_1k"),
    _captions("MSVD", "Find the video snippet that corresponds to the given summary:", "video_id", "caption", 670,
              revision="558dffda21e648108ebc62047ee06c60d40fa702"),
    _captions("VATEX", "Select a video that fits the description provided:", "videoID", "enCap", 4478),
    _captions("YouCook2", "Find a video that demonstrates the following action while making a recipe:", "id",
              "sentence", 3179, "lmms-lab/YouCook2", "d164962a70c383a57726388c9851e1486e9a9db7", split="val"),
    *(Set(name, "moment retrieval", "video", "vt2v", "clips", f"VLM2Vec/{name}", instruction=_MOMENT,
          document_instruction=_VIDEO, columns={"video": "video_path", "text": "query"},
          media=f"video_mret/{media}/{{}}", candidates=10, queries=queries)
      for name, media, queries in (("QVHighlight", "QVHighlight", 1083), ("Charades-STA", "Charades_STA", 727))),
    Set("MomentSeeker", "moment retrieval", "video", "vt2v", "moments", "VLM2Vec/MomentSeeker",
        columns={"text": "query", "input": "input_frames", "positives": "positive_frames",
                 "negatives": "negative_frames"},
        document_instruction="Understand the content of the provided video clip.",
        instruction="Find the clip that corresponds to the given text:",
        media="video_mret/MomentSeeker/video_frames/{}", queries=1602),
)  # fmt: skip

MVBENCH = ("episodic_reasoning", "action_sequence", "action_prediction", "action_antonym", "fine_grained_action",
           "unexpected_action", "object_existence", "object_interaction", "object_shuffle", "moving_direction",
           "action_localization", "scene_transition", "action_count", "moving_count", "moving_attribute",
           "state_change", "fine_grained_pose", "character_order", "egocentric_navigation",
           "counterfactual_inference")  # fmt: skip
MOMENTS = {"picture": "Select the video clip that aligns with the given text and image:",
           "video": "Find the clip that corresponds to the given sentence and video segment:"}  # fmt: skip

# Pages ----------------------------------------------------------------------------------------------------------------

_PAGE = "Find a document image that matches the given query:"
_PAGE_SEEN = "Understand the content of the provided document image."


def _pages(
    task: str,
    split: str,
    owner: str,
    sets: Mapping[str, tuple[str, str | None, int, int | None]],
    languages: tuple[str, ...] = ("en",),
) -> tuple[Set, ...]:
    """Sets by name, each with its repository, revision, queries, and pages of its corpus."""
    return tuple(
        Set(name, task, "document", "t2i", "pages", f"{owner}/{repository}", revision, split=split, instruction=_PAGE,
            document_instruction=_PAGE_SEEN, columns={"query": "query-id", "text": "query", "document": "corpus-id",
            "image": "image", "grade": "score"}, candidates=pages, queries=queries, languages=languages)
        for name, (repository, revision, queries, pages) in sets.items()
    )  # fmt: skip


_PAGE_SETS = (
    *_pages("ViDoRe v1", "test", "vidore", {
        "ViDoRe_arxivqa": ("arxivqa_test_subsampled_beir", "7d94d570960eac2408d3baa7a33f9de4822ae3e4", 500, 500),
        "ViDoRe_docvqa": ("docvqa_test_subsampled_beir", "162ba2fc1a8437eda8b6c37b240bc1c0f0deb092", 451, 500),
        "ViDoRe_infovqa": ("infovqa_test_subsampled_beir", "b802cc5fd6c605df2d673a963667d74881d2c9a4", 494, 500),
    }),
    *_pages("ViDoRe v1", "test", "vidore", {
        "ViDoRe_tabfquad": ("tabfquad_test_subsampled_beir", "61a2224bcd29b7b261a4892ff4c8bea353527a31", 280, 70),
    }, ("fr",)),
    *_pages("ViDoRe v1", "test", "vidore", {
        "ViDoRe_tatdqa": ("tatdqa_test_beir", "5feb5630fdff4d8d189ffedb2dba56862fdd45c0", 1646, 277),
    }),
    *_pages("ViDoRe v1", "test", "vidore", {
        "ViDoRe_shiftproject": ("shiftproject_test_beir", "84a382e05c4473fed9cff2bbae95fe2379416117", 100, 1000),
    }, ("fr",)),
    *_pages("ViDoRe v1", "test", "vidore", {
        f"ViDoRe_syntheticDocQA_{topic}": (f"syntheticDocQA_{topic}_test_beir", revision, 100, pages)
        for topic, revision, pages in (
            ("artificial_intelligence", "2d9ebea5a1c6e9ef4a3b902a612f605dca11261c", 968),
            ("energy", "9935aadbad5c8deec30910489db1b2c7133ae7a7", 977),
            ("government_reports", "b4909afa930f81282fd20601e860668073ad02aa", 972),
            ("healthcare_industry", "f9e25d5b6e13e1ad9f5c3cce202565031b3ab164", 965))
    }),
    *_pages("ViDoRe v2", "test", "vidore", {
        "ViDoRe_esg_reports_human_labeled_v2":
            ("esg_reports_human_labeled_v2", "6d467dedb09a75144ede1421747e47cf036857dd", 52, 1538),
    }),
    *_pages("ViDoRe v2", "test", "vidore", {
        f"ViDoRe_{name}_v2_multilingual": (f"{name}_v2", revision, queries, pages)
        for name, revision, queries, pages in (
            ("biomedical_lectures", "a29202f0da409034d651614d87cd8938d254e2ea", 640, 1016),
            ("economics_reports", "b3e3a04b07fbbaffe79be49dabf92f691fbca252", 232, 452),
            ("esg_reports", "0542c0d03da0ec1c8cbc517c8d78e7e95c75d3d3", 228, 1538))
    }, ("en", "fr", "es", "de")),
    *_pages("VisRAG", "train", "openbmb", {
        f"VisRAG_{name}": (f"VisRAG-Ret-Test-{name}", revision, queries, pages)
        for name, revision, queries, pages in (
            ("ArxivQA", "00a31fc1e899b5f81d7760eca4907b1a1005865b", 816, 8066),
            ("ChartQA", "31f5ceb5d60b02e065bff394cb582f5bbb01a9b6", 63, 500),
            ("MP-DocVQA", "3ebd091c458cf04161f78cd7b12ea101f83e2529", 591, 741),
            ("SlideVQA", "6b5f81a3f6953095934c26c5d420dfd039184d69", 556, 1284),
            ("InfoVQA", "04ee2db1d0a05304899453a3b03baef5e18991a3", 718, 459),
            ("PlotQA", "ef953ef8ab6d78ac112dd4cde6acdb2c2692039a", 863, 9593))
    }),
    *_pages("out-of-domain", "test", "VLM2Vec", {
        "ViDoSeek-page": ("ViDoSeek-page-fixed", None, 1142, None), "ViDoSeek-doc": ("ViDoSeek", None, 1142, 5349),
        "MMLongBench-page": ("MMLongBench-page-fixed", None, 838, None),
        "MMLongBench-doc": ("MMLongBench-doc", "1c2ee8f611a6c552d4bd90daca3a92d7a55ff806", 838, 6492),
    }),
)  # fmt: skip

V1: tuple[Set, ...] = _IMAGE_SETS
V2: tuple[Set, ...] = (*_IMAGE_SETS, *_VIDEO_SETS, *_PAGE_SETS)
