"""报告的中文字体：用给出的或这台机器上的一个，网页里只嵌用到的字；一个也没有时用看的人自己的字体。"""

import logging
from io import BytesIO
from pathlib import Path

# 系统里这些文件名（小写、不含后缀）的字体，依次找；matplotlib 自己的字体表是旧的缓存，不用它
NAMES = (
    *("notosanscjksc-regular", "notosanssc-regular", "notosanscjk-regular", "sourcehansanssc-regular"),
    *("sourcehansanscn-regular", "wqy-microhei", "wqy-zenhei", "droidsansfallbackfull", "droidsansfallback"),
    *("msyh", "simhei", "pingfang", "hiragino sans gb", "stheiti light"),
)


def find_font(path: Path | None = None) -> Path | None:
    """给出的字体文件，没有给时在系统的字体里找；都没有时为 None。

    Raises:
        ValueError: 给出的不是字体文件。
    """
    from matplotlib import font_manager

    if path is None:
        found = {Path(file).stem.lower(): Path(file) for file in sorted(font_manager.findSystemFonts())}
        return next((found[name] for name in NAMES if name in found), None)
    try:
        font_manager.get_font(str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--font {path} 读不了（{error}），请给出 TTF 或 OTF 文件") from error
    return path


def simplified(path: Path) -> int:
    """字体合集（.ttc）里简体的一个是第几个；不是合集，或没有写明的，是第一个。"""
    from fontTools.ttLib import TTCollection

    if path.suffix.lower() not in (".ttc", ".otc"):
        return 0
    names = [font["name"].getDebugName(4) or "" for font in TTCollection(str(path), lazy=True)]
    return next((index for index, name in enumerate(names) if " SC" in f" {name} ".replace("-", " ")), 0)


def font_subset(path: Path, text: str) -> bytes:
    """字体里 text 用到的字；同样的文字得到同样的字节。"""
    from fontTools import subset

    logging.getLogger("fontTools.subset").setLevel(logging.ERROR)  # 不认识的表略去，不必说
    options = subset.Options(notdef_outline=True, hinting=False, layout_features=[], font_number=simplified(path))
    font = subset.load_font(str(path), options)
    font["head"].modified = font["head"].created
    font.recalcTimestamp = False
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    stream = BytesIO()
    font.save(stream)
    return stream.getvalue()
