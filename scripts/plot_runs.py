"""Draw the metrics of runs: scripts/plot_runs.py 'runs=[runs/a,runs/b]' 'metrics=[psnr_db]'; --help lists the keys."""

from configs.command_line import run
from pipelines.curves import CurvesConfig, plot_runs

if __name__ == "__main__":
    run(plot_runs, CurvesConfig)
