"""Lip-sync of clips: offset (positive: audio late), agreement at lag 0 and at the best lag, and why
if not measured.

    python samples/eval_lipsync.py clips/*.mp4 [--csv out.csv --json out.json --html out.html
    --self-test]

The same as `avdiff eval lipsync`; for use from Python see the last lines.
"""

from __future__ import annotations

import sys

from avdiff.cli.main import main

if __name__ == "__main__":
    main(["eval", "lipsync", *sys.argv[1:]])

# from avdiff.evaluation.lipsync.measure import LipSync, score
# row = LipSync().measure("clip.mp4").row      # a dict: status, offset_ms, score_at_zero, ...
# reward = score(clip)                         # a file, or an avdiff.media.write.Clip in memory
