"""The gallery: every model of the zoo in a browser (`mmoe demo`), and a short tour in the terminal (`mmoe tour`)."""
