"""English text for `train.py --data FOLDER`, from a package of Debian, "anarchism", a book of 2 million words:

    python results/english.py FOLDER        # needs apt-get and dpkg-deb, no root
"""
import argparse
import html
import re
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "anarchism"
NO_TEXT = re.compile(r"<(script|style|head)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=temp, check=True)
        [package] = Path(temp).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, temp], check=True)
        pages = sorted(Path(temp).rglob("*.html"))
        for page in pages:
            text = html.unescape(NO_TEXT.sub("", page.read_text(encoding="utf-8", errors="replace")))
            (folder / f"{page.stem}.txt").write_text(text, encoding="utf-8")
    print(f"{len(pages)} texts in {folder}")


if __name__ == "__main__":
    main()
