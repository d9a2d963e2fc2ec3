"""Many runs from one command line: expanded or searched, launched, skipped when done, summed up."""
