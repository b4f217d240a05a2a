# Finds a Python (PYTHON overrides it) and hands over to run_tests.py.
Set-Location $PSScriptRoot
foreach ($python in @($env:PYTHON, "py", "python3", "python")) {
    if ($python -and (Get-Command $python -ErrorAction SilentlyContinue)) {
        & $python -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>$null
        if ($LASTEXITCODE -eq 0) {
            & $python run_tests.py @args
            exit $LASTEXITCODE
        }
    }
}
[Console]::Error.WriteLine("error: no Python 3.10 or newer found; install one, or set PYTHON to it")
exit 1
