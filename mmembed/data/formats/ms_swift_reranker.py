"""ms-swift's rows for rerankers: those for embedding, whose documents are what an assistant says.

{"messages": [{"role": "user", "content": "..."}], "positive_messages": [[{"role": "assistant", "content": "..."}]],
 "negative_messages": [[{"role": "assistant", "content": "..."}]]}
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mmembed.data.formats.ms_swift import MsSwift
from mmembed.data.holding import Holds


class MsSwiftReranker(MsSwift):
    """Rows of ms-swift for rerankers: those of `ms_swift`, with documents of role `assistant`."""

    name: ClassVar[str] = "ms_swift_reranker"
    holds: Holds = dataclasses.replace(MsSwift.holds)
    role: ClassVar[str] = "assistant"
