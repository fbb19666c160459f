"""测试用的几个位置。"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
LOCAL_GOLDENS = ROOT / "tests" / "goldens"
