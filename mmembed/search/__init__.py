"""Search: the rows of a corpus that are most similar to a query. One search serves commands, evaluation and mining.

    top_k            exact, over a corpus of any size and precision (exact.py)
    FaissIndex       FAISS: flat, IVF or HNSW, where it is installed (faiss_index.py)
    rescore_maxsim   late interaction of many vectors an input over what one of these found (late_interaction.py)
    pair_scores      similarities of given pairs, for example of queries and their known positives (vectors.py)

All give the same score for the same two vectors, bit by bit: products are summed in float64, in one order, and rounded
to float32. So a result does not depend on block sizes, threads, processor or device, and ties are ties: the smaller row
comes first.
"""

from mmembed.search.exact import top_k as top_k
from mmembed.search.faiss_index import FaissIndex as FaissIndex
from mmembed.search.late_interaction import TokenVectors as TokenVectors
from mmembed.search.late_interaction import rescore_maxsim as rescore_maxsim
from mmembed.search.vectors import Hits as Hits
from mmembed.search.vectors import Similarity as Similarity
from mmembed.search.vectors import open_vectors as open_vectors
from mmembed.search.vectors import pair_scores as pair_scores
