"""Many runs from one file: variants x grid or random draws x seeds, on worker processes that are used again and again.

config       the file
points       its runs, and what is left of them in their folders
workers      processes that train, score and analyse one run after the other
run          the whole: what has no result yet is run
table        means over seeds, paired differences, curves
conclusion   more tables and pictures, by a file in recipes/
report       all of it in one HTML file

Each run is a run directory below that of the sweep, with `result.json` in it once it is done. So a sweep that was
stopped or killed goes on with what has none: a run that was half way goes on from its checkpoint.

    runs/NAME/
      RUN/                  a run directory each, named after its settings and seed
      worker-0.log          what the workers said
      results.jsonl         a row a finished run
      table.md curves.png   means over seeds, and curves over steps, a picture for each of several monitors
      report.html           both in one file, with commands, and the tables and pictures of `conclusion`
"""
