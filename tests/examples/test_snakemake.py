"""What the study relies on in Snakemake."""

import subprocess
import sys

SNAKEFILE = """
rule all:
    input: "1", "2", "3"

rule first:
    output: "first"
    shell: "touch {output}"

rule job:
    input: "first"
    output: "{number}"
    shell: "echo begins >> log; sleep 0.5; echo ends >> log; touch {output}"
"""


def test_no_more_jobs_at_a_time_than_cores(tmp_path):
    """Snakemake 9.10 to 9.16 count a core twice after a job that was ready alone (snakemake/snakemake, issue 3913)."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--scheduler", "greedy", "--quiet", "all"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "log").read_text().split() == ["begins", "ends"] * 3
