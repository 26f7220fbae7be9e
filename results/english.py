"""English text for `train.py --data FOLDER`: "anarchism", a book of 2 million words, from Debian.

    python results/english.py FOLDER        # needs apt-get and dpkg-deb, no root
"""
import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "anarchism"
NO_TEXT = re.compile(r"<(script|style|head)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=temp, check=True)
        [package] = Path(temp).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, temp], check=True)
        for page in Path(temp).rglob("*.html"):
            text = html.unescape(NO_TEXT.sub("", page.read_text(encoding="utf-8", errors="replace")))
            (folder / f"{page.stem}.txt").write_text(text, encoding="utf-8")
    print(f"{len(list(folder.iterdir()))} texts in {folder}, from {package.name}")


if __name__ == "__main__":
    main()
