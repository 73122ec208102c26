"""Finding out what is wrong with a pass: cases, bisection, reduction, and looking while it runs."""
