"""Files that are whole or not there, and digests of what a result depends on: those of the library."""

from mmembed.files import digest as digest
from mmembed.files import stamps as stamps
from mmembed.files import write_whole as write_whole
