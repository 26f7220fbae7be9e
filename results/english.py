"""English text for `train.py --data FOLDER`: "anarchism", a book of 2 million words, from Debian.

python results/english.py FOLDER        # needs apt-get and dpkg-deb, no root
"""

import argparse
import html
import re
import subprocess
import tempfile
from pathlib import Path

NO_TEXT = r"(?is)<(script|style|head)\b.*?</\1>|<[^>]*>"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
folder.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as temp:
    subprocess.run("apt-get download anarchism && dpkg-deb -x *.deb .", cwd=temp, check=True, shell=True)
    for page in Path(temp).rglob("*.html"):
        text = html.unescape(re.sub(NO_TEXT, "", page.read_text(encoding="utf-8", errors="replace")))
        (folder / f"{page.stem}.txt").write_text(text, encoding="utf-8")
print(len(list(folder.iterdir())), "texts in", folder)
