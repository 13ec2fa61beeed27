"""Our speed beside what a user would write instead, as ratios of one interleaved run: the parts of the verb `bench`.

timing          ways of doing one thing, in turn
tables          what each of the others found, as the terminal shows it
step            the engine's step, against a bare loop
loader          the loader, against webdataset, files and lhotse
layers          LSTM layers, against torch's; the operators themselves are in kernels/bench.py
orthogonal      what an orthogonal matrix costs; copying, against torch's parts
language        language models, against torch's parts
plan            index and plan of large synthetic corpora
scaling         processes, against copies that exchange nothing, and a model of communication
memory          resident size by depth and batch
utilization     what a step needs, over what the device could have done
batch_size      the largest budget of a micro-batch that fits
pseudospectrum  seconds and error of the analysis of a large recurrence

Each rival stands in full in the file that measures against it, and computes the same before it is timed.
"""
