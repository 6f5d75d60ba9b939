"""Pictures and tables from stored runs, without torch; from the shell `python -m sanity.report RUN [RUN ...]`."""
