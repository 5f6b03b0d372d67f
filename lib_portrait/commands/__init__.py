"""The commands that the runtime itself carries out. Their modules import the standard library only at their top."""
