"""The parts of `python -m data_tools.mine_negatives`, in the order in which they run.

settings.py      the config
collection.py    records and documents of one source, read once: equal contents are one row
retrievers/      what scores a query with every document: a file each
tokens.py        vectors of contents that have many each
steps.py         vectors, candidates, a teacher's scores, the choice, the records
teachers/        what scores a query with one document: a file each
audit.py         what was mined: report.json and report.html
"""
