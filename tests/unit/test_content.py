"""Content: what users write is read, what cannot be right is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmembed.content import Audio, Image, Text, Video, to_content
from mmembed.errors import MmembedError

PICTURE = PIL.Image.new("RGB", (4, 3))
SAMPLES = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", (Text("a"),)),
        ({"text": "a"}, (Text("a"),)),
        (Path("x.png"), (Image("x.png"),)),
        (b"bytes", (Image(b"bytes"),)),
        (PICTURE, (Image(PICTURE),)),
        ({"image": "x.png", "text": "a"}, (Image("x.png"), Text("a"))),
        ({"text": "a", "image": None}, (Text("a"),)),
        ({"images": ["x.png", "y.png"]}, (Image("x.png"), Image("y.png"))),
        ({"image": "x.png", "images": ["y.png"]}, (Image("x.png"), Image("y.png"))),
        ({"video": ["x.png", "y.png"]}, (Video((Image("x.png"), Image("y.png"))),)),
        ({"audio": "x.wav"}, (Audio("x.wav"),)),
        (["a", {"image": "x.png"}, "b"], (Text("a"), Image("x.png"), Text("b"))),
        (Image("x.png"), (Image("x.png"),)),
    ],
)
def test_reads_what_users_write(value, expected):
    assert to_content(value) == expected


def test_audio_samples_keep_their_rate():
    (part,) = to_content({"audio": SAMPLES, "sampling_rate": 16000})
    assert part.source is SAMPLES
    assert part.sampling_rate == 16000


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"txt": "a"}, "did you mean 'text'"),
        ({"text": 3}, "'text' is a int"),
        ({}, "nothing to embed"),
        ([], "nothing to embed"),
        (7, "cannot read a int"),
        ({"image": 7}, "cannot read a int as an image"),
        ({"images": "x.png"}, "'images' is a str; give a list"),
        ({"images": []}, "'images' is an empty list"),
        ({"video": "x.mp4"}, "give the frames as a list"),
        ({"text": "a", "sampling_rate": 2}, "'sampling_rate' describes 'audio'"),
        ({"video": ["x.png"], "fps": 2}, "unknown key 'fps'"),
        ({"audio": SAMPLES}, "without 'sampling_rate'"),
        ({"audio": SAMPLES.reshape(2, 4), "sampling_rate": 8}, "one-dimensional"),
    ],
)
def test_names_what_cannot_be_right(value, named):
    with pytest.raises(MmembedError, match=named):
        to_content(value)


def test_import_stays_light():
    heavy = "torch,transformers,numpy,PIL,pyarrow,datasets"
    code = f"import sys, mmembed.content; print([name for name in '{heavy}'.split(',') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
