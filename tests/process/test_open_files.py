"""Limits of open files: a run with more files than a process may open."""

from __future__ import annotations

from pathlib import Path

from helpers import load_of, map_of, open_writer, run_child, start_child


def test_more_ranks_than_open_files_can_be_read(tmp_path: Path) -> None:
    """A run can have more files, and a step more ranks, than a process may open."""
    ranks = 24
    for rank in range(ranks):
        with open_writer(
            tmp_path, ep_rank=rank, ep_size=ranks, num_logical_experts=ranks, segment_steps=4, scope="local"
        ) as writer:
            for step in range(8):
                writer.record(step, load_of(step, rank, slots=ranks), map_of(0, slots=ranks))
    script = """
        import resource, sys
        from eplb_analyze import open_run
        from eplb_analyze.analysis.experts import expert_report
        from eplb_analyze.analysis.summary import summarize
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        run = open_run(sys.argv[1])
        print(summarize(run).steps.to_json()["recorded"], expert_report(run).recorded, run.findings)
    """
    assert run_child(script, tmp_path) == "8 8 []\n"


def test_reaching_the_limit_of_open_files_is_not_reported_as_damage(tmp_path: Path) -> None:
    """Killed writers leave as many open journals as there are ranks."""
    script = """
        import os, sys
        from helpers import load_of, map_of, open_writer
        options = dict(ep_size=24, num_logical_experts=24, scope="local")
        writers = [open_writer(sys.argv[1], ep_rank=rank, **options) for rank in range(24)]
        for rank, writer in enumerate(writers):  # at about the same time, as check expects it
            writer.record(0, load_of(0, rank, slots=24), map_of(0, slots=24))
        assert all(writer.flush(60) for writer in writers)
        os._exit(0)
    """
    run_child(script, tmp_path)
    script = """
        import errno, resource, sys
        from eplb_analyze import open_run
        assert open_run(sys.argv[1]).findings == []  # everything is imported
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 100))
        try:
            print(open_run(sys.argv[1]).findings)
        except OSError as error:
            print(error.errno == errno.EMFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        print(open_run(sys.argv[1]).findings)
    """
    assert run_child(script, tmp_path) == "True\n[]\n"
    script = """
        import resource, sys
        from eplb_analyze.cli import app as cli
        sys.argv[1:] = ["summary", sys.argv[1]]
        for limit in (100, 5):  # the first time imports everything
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 100))
            try:
                cli.main()
            except SystemExit as end:
                print(limit, end.code, file=sys.stderr)
    """
    with start_child(script, tmp_path) as child:
        _, err = child.communicate(timeout=60)
    *_, done, error, ended = err.splitlines()
    assert (done, ended) == ("100 0", "5 3")
    assert error.startswith("eplb-analyze: error: ")
    assert error.endswith("too many open files; raise the limit with `ulimit -n 4096`")
