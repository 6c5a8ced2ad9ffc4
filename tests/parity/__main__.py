"""``python -m tests.parity FILE|FOLDER...``: one line per tensor, and a non-zero exit if anything is off."""

import sys

import torch

from tests.parity.runner import checks, files


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python -m tests.parity FILE|FOLDER...", file=sys.stderr)
        return 2
    count, failed = 0, []
    for path in files(paths):
        try:
            for golden, check in checks(path):
                count += 1
                verdict = "ok" if check.ok else "FAIL"
                line = f"{golden.case:36} {check.tensor:72} {check.run:5} {check.error:9.2e} {check.tolerance:7.0e}"
                line = f"{line} {verdict}"
                print(line)
                if not check.ok:
                    failed.append(line)
        except Exception as error:  # one broken file must not hide the others
            failed.append(f"{path}: {type(error).__name__}: {error}")
            print(failed[-1])
    print(f"{count} comparisons, {len(failed)} failures")
    if failed:
        print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
